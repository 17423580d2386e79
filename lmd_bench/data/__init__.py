"""Where images come from: generated scenes and folders of the user's own."""
