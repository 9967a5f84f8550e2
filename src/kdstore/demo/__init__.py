"""The built-in teachers and the demo run: the whole pipeline on scenes."""
