"""What stands in a stand-alone module for the derivatives that its gradients do not have."""

TEXT = '''
class Once(torch.autograd.Function):
    """The first n tensors, as functions of all, whose derivatives are refused: none would silently be zero."""

    @staticmethod
    def forward(ctx, n, *tensors):
        return tensors[:n]

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("this module has no second derivatives: leave out create_graph=True")


def once(gradients, given):
    found = [g for g in gradients if g is not None]
    marked = iter(Once.apply(len(found), *found, *given) if torch.is_grad_enabled() else found)
    return tuple(None if g is None else next(marked) for g in gradients)
'''
