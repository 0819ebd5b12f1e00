"""Get the pinned llama.cpp, apply cpp_patch to a copy, build it with CMake, find the binaries."""
