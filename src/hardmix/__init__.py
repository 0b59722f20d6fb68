"""hardmix: hard mixed samples for class labels, few labels, numbers and image-text pairs.

Importing the package loads nothing but this file; take what you need from `hardmix.mixing` and `hardmix.losses`.
"""

__version__ = "0.1.0"
