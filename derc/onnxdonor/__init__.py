"""ONNX files as donors: a file is read, built as a torch network, and held against ONNX Runtime."""
