"""Pretraining data of the inverse model: transitions, their sources and their mixture (Sec. 3.2, A.2, Table 12)."""
