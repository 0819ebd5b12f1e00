"""The main job on a real model: what `longrope-export demo` does."""
