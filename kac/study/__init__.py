"""What the papers of Kac flows claim, measured on trained networks: one module a claim, pure functions of tensors and
networks. Quality is that of delivered images; velocities and energies are the network's own.
"""
