"""Generated captions, region captions and referred boxes."""
