"""`fastdraft demo`: a prompt answered by the target alone and with a draft, side by side."""
