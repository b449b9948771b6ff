"""The libraries that numflash is compared with."""
