"""What `fqcompile demo` runs: two real models, compiled, measured and checked.

In the package, so that the demo is there wherever fqcompile is installed: a wheel has no examples.
"""
