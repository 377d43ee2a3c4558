"""Pretraining data of the inverse model: transitions, their sources and how they are mixed (Sec. 3.2, A.2, Table 12)."""
