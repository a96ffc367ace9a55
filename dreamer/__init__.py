"""The Dreamer family in pure torch: networks, recurrent state-space models, agents, optimisers.

Shape legend, used in comments and docstrings throughout:

    B  batch                    T  replay time            H  imagination steps
    N  = B·T imagination starts A  action                 E  embedding (encoder out)
    D  deter                    S  stoch groups           K  classes per group
    F  = D + S·K feature        P  prototypes             c h w  image (lower case)

Batch comes first everywhere; imagination is (N, H+1, …). The latent state is one named tuple
``State(deter, stoch)``. Nothing here does I/O, and nothing below ``agent.py`` sees a config.
"""
