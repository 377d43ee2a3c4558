"""Finetuning data: annotated CALVIN windows, packed frames, and features of the frozen models (Sec. 4.2)."""
