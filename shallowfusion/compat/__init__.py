"""The interfaces of other libraries, on this one's searches."""
