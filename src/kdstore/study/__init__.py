"""The study: a grid of teachers, losses, students, seeds and lengths, run alike and told with its doubt."""
