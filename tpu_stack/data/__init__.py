"""Text to batches: sources, tokenizer, packing, pipeline. Each module's docstring shows its use.

Nothing is imported here: grain and pyarrow take seconds, and generating text needs neither.
"""
