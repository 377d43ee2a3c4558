"""Rolling a policy out in many simulators, and what is learned from the record of it (Sec. 4.2, App. Q9)."""
