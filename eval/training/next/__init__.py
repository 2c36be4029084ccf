"""tiny-llava-next: tiny-llava grown to several tiles a picture."""
