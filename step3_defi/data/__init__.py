"""Finetuning data: annotated CALVIN windows, packed frames, and stored features of the frozen parts (Sec. 4.2)."""
