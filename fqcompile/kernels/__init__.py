"""The operators that rewritten graphs call, the kernel templates, and their selection."""
