"""capture → match → choose → quantize → rewrite → fuse → select → lower, one file each."""
