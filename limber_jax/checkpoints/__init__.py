"""What a run keeps in its workdir: the state and its checkpoints, what they belong to, and what was measured."""
