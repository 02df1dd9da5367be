"""What other libraries are told of packed weights, so that their own functions take them.

Nothing here is imported by `import fqcompile`: each file needs its library, and registers with it.
"""
