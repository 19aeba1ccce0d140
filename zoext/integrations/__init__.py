"""Forward-only fine-tuning with the trainers of other libraries.

Each module needs its library: ``pip install 'zoext[transformers]'`` for ``zoext.integrations.transformers``.
Importing ``zoext`` imports none of them.
"""
