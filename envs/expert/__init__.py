"""A scripted expert that carries out the 34 tasks from the privileged state of the simulator."""
