"""The package's C++ for x86: the kernel of quantized matmuls and the quantizer."""
