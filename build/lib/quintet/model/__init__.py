"""The DeepSeek-V3 model as single-device PyTorch: no mesh, no rank, no process group."""
