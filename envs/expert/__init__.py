"""A scripted expert that carries out the 34 tasks from privileged state."""
