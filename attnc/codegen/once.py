"""What stands in a stand-alone module for the derivatives that its gradients do not have."""

TEXT = '''
class Once(torch.autograd.Function):
    """The first n tensors, as functions of all: a derivative of theirs is refused, where none would silently be zero."""

    @staticmethod
    def forward(ctx, n, *tensors):
        return tensors[:n]

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("this module has no second derivatives: leave out create_graph=True")


def once(gradients, given):
    """Gradients of `given`, as a graph of them asks for."""
    if not torch.is_grad_enabled():
        return gradients
    found = [g for g in gradients if g is not None]
    marked = iter(Once.apply(len(found), *found, *given))
    return tuple(None if g is None else next(marked) for g in gradients)
'''
