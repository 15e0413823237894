"""What a stand-alone module says of the derivatives that its gradients do not have, which would silently be zero."""

REFUSAL = """\
        if torch.is_grad_enabled():
            raise RuntimeError("this module has no second derivatives: leave out create_graph=True")
"""
