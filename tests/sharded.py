import sys, json, torch
import many
import scoreaction as sa
from scoreaction.world import World
def run(name, shard, **more):
    kw = {}
    case = many.CASES[name]
    import dataclasses
    orig = sa.Train
    def T(**k): return orig(**{**k, "shard": shard, **more})
    sa.Train = T
    try: return case()
    finally: sa.Train = orig
if __name__ == "__main__":
    torch.set_num_threads(1)
    World.joined("cpu")
    from scoreaction.networks.sharding import whole
    for name in sys.argv[1:] or many.CASES:
        out = []
        for shard in (False, True):
            try:
                tuner = run(name, shard, iterations=4)
                rows = [{k: v for k, v in m.items() if k != "seconds"} for m in tuner]
                out.append((rows, torch.cat([whole(p).detach().flatten() for p in tuner.model.parameters.values()])))
            except Exception as e:
                import traceback; traceback.print_exc()
                print(name, shard, "RAISED", type(e).__name__, str(e)[:300], flush=True)
        if len(out) == 2 and World.current().leads:
            (a, w), (b, v) = out
            bad = {k: (x[k], y[k]) for x, y in zip(a, b) for k in x if abs(x[k]-y[k]) > 1e-5*max(1, abs(x[k]))}
            print(name, "weights", float((w-v).abs().max()), "bad", bad, flush=True)
