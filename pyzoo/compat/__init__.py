"""The call signatures of other packages around pyzoo's operators: change the import, keep the code."""
