"""The CPU backend: csrc/cpu, one call for all layers of a group."""
class CpuBackend:
    name = "cpu"
    def unsupported(self, specs=None):
        return ["not built yet"]
    def tables(self, specs):
        return []
