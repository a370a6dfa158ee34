"""Pure parsers and writers of file formats: bytes in, values and edits out."""
