"""open_clip models: by what names they are found, which weights they are, and how they encode."""
