"""The code of `fqcompile demo`: compile two real models, measure them and check the results.

Part of the package, so that the demo is available wherever fqcompile is installed.
"""
