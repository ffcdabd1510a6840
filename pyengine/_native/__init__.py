"""The native modules: loops over threads, panels, rows and heads. They import nothing of pyengine but its errors."""
