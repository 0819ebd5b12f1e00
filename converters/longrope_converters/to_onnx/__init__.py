"""ONNX: a folder for ONNX Runtime and onnxruntime-genai, with the factors in the graph."""
