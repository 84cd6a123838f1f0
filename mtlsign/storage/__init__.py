"""Storage backends (local folder, S3) and the file formats written to them."""
