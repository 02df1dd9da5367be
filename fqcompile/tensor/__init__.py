"""What a packed weight is: its format, its codes and scales. Knows neither kernels nor graphs."""
