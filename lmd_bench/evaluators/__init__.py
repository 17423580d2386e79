"""Small evaluators of generated scenes: a classifier behind FID, KID, precision and recall, a CLIP behind CLIP-score.

They stand in where Inception and CLIP are not there, for scenes alone, and never under their names: columns read
"FID (scenes features)" and "CLIP-score (scenes)". The files in `weights/` were made by

    lmd-bench evaluators train classifier --out DIR
    lmd-bench evaluators train clip --out DIR

each with its default options; a file's metadata names its command, steps, seed, torch version and the digest of the
scenes, and `weights/manifest.json` its SHA-256. `lmd-bench evaluators test` measures both on held-out scenes.
"""
