"""Data: from knowledge cards or any source to records, and from records to tokens with labels."""
