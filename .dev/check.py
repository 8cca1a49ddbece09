import time, sys, traceback
import jax, jax.numpy as jnp, numpy as np
from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.grouped_matmul.pallas_gpu import hopper

print(jax.__version__, jax.devices())


def timeit(f, *a, n=10):
    r = f(*a)
    jax.block_until_ready(r)
    t = time.perf_counter()
    for _ in range(n):
        r = f(*a)
    jax.block_until_ready(r)
    return (time.perf_counter() - t) / n * 1e3


def ref(x, w, s):
    out = np.zeros((x.shape[0], w.shape[1]), np.float32)
    b = 0
    for g, n in enumerate(s):
        out[b : b + n] = x[b : b + n] @ w[g].T
        b += n
    return out


rng = np.random.default_rng(0)


def err(a, b):
    a = np.asarray(a, np.float32)
    b = np.asarray(b, np.float32)
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-9))


for M, G, N, K, sizes in [
    (2048, 4, 128, 192, [100, 0, 1500, 301]),
    (4096, 16, 320, 192, None),
    (4096, 63, 384, 512, None),
    (2048, 8, 256, 256, [0, 0, 2048, 0, 0, 0, 0, 0]),
    (1024, 8, 512, 384, [1, 2, 3, 7, 129, 0, 65, 500]),
]:
    try:
        if sizes is None:
            sizes = rng.multinomial(M, rng.dirichlet(np.ones(G)))
        x = jnp.asarray(rng.standard_normal((M, K)), jnp.bfloat16)
        w = jnp.asarray(rng.standard_normal((G, N, K)), jnp.bfloat16)
        dy = jnp.asarray(rng.standard_normal((M, N)), jnp.bfloat16)
        s = jnp.asarray(sizes, jnp.int32)
        out = []
        for fn in (
            hopper,
            lambda x, w, s: grouped_matmul(x, w, s, implementation="padded"),
        ):

            @jax.jit
            def both(x, w, s, dy):
                y, vjp = jax.vjp(lambda x, w: fn(x, w, s), x, w)
                return (y, *vjp(dy))

            out.append(jax.device_get(both(x, w, s, dy)))
        X, W, DY = (np.asarray(a, np.float32) for a in (x, w, dy))
        y = ref(X, W, sizes)
        dw = np.zeros_like(W)
        b = 0
        dx = np.zeros_like(X)
        for g, n in enumerate(sizes):
            dw[g] = DY[b : b + n].T @ X[b : b + n]
            dx[b : b + n] = DY[b : b + n] @ W[g]
            b += n
        print(
            (M, G, N, K),
            "hopper",
            [err(a, r) for a, r in zip(out[0], (y, dx, dw))],
            "padded",
            [err(a, r) for a, r in zip(out[1], (y, dx, dw))],
            flush=True,
        )
        sizes = None
    except Exception:
        traceback.print_exc()
for M, G, N, K in [
    (32768, 8, 4096, 7168),
    (32768 * 7, 63, 384, 512),
    (32768 * 7, 63, 512, 384),
    (229376, 64, 896, 1280),
    (24576, 64, 2816, 2048),
    (32768, 256, 4096, 7168),
]:
    sizes = rng.multinomial(M, rng.dirichlet(np.full(G, 20.0)))
    s = jnp.asarray(sizes, jnp.int32)
    x = jax.random.normal(jax.random.key(0), (M, K), jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (G, N, K), jnp.bfloat16)
    dy = jax.random.normal(jax.random.key(2), (M, N), jnp.bfloat16)
    for name, fn in (
        ("hopper", hopper),
        ("padded", lambda x, w, s: grouped_matmul(x, w, s, implementation="padded")),
    ):
        if name == "padded" and M * N * K > 1e12 and G != 64:
            continue
        try:
            f = jax.jit(fn)
            t = timeit(f, x, w, s)
            g = jax.jit(
                lambda x, w, s, dy: jax.vjp(lambda x, w: fn(x, w, s), x, w)[1](dy)
            )
            tb = timeit(g, x, w, s, dy)
            fl = 2 * M * N * K / 1e9
            print(
                (M, G, N, K),
                name,
                f"fwd {t:.3f} ms {fl / t:.0f} TF; bwd {tb:.3f} ms {2 * fl / tb:.0f} TF",
                flush=True,
            )
        except Exception as e:
            print(name, type(e), str(e)[:300])
a = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
t = timeit(jax.jit(lambda a, b: a @ b), a, a)
print("dot 8192", 2 * 8192**3 / 1e9 / t)
from pallas_kernels.flash_attention.cudnn import cudnn, available

print("cudnn", available())
for H, U in ((64, 64), (48, 32), (192, 128)):
    try:
        B, T, Nh = (32, 1024, 8) if H < 100 else (1, 4096, 128)
        q = jax.random.normal(jax.random.key(0), (B, T, Nh, 1, H), jnp.bfloat16)
        k = jax.random.normal(jax.random.key(1), (B, T, Nh, H), jnp.bfloat16)
        v = jax.random.normal(jax.random.key(2), (B, T, Nh, U), jnp.bfloat16)
        f = jax.jit(lambda q, k, v: cudnn(q, k, v, scale=H**-0.5))
        g = jax.jit(
            jax.grad(
                lambda q, k, v: cudnn(q, k, v, scale=H**-0.5).astype(jnp.float32).sum(),
                argnums=(0, 1, 2),
            )
        )

        def r(q, k, v):
            s = (
                jnp.einsum(
                    "btkgh,bskh->bkgts", q.astype(jnp.float32), k.astype(jnp.float32)
                )
                * H**-0.5
            )
            s = jnp.where(jnp.tril(jnp.ones((T, T), bool)), s, -1e30)
            return jnp.einsum(
                "bkgts,bsku->btkgu", jax.nn.softmax(s), v.astype(jnp.float32)
            )

        e = None
        if H < 100:
            rr = jax.jit(r)
            e = err(
                jax.device_get(f(q[:2], k[:2], v[:2])),
                jax.device_get(rr(q[:2], k[:2], v[:2])),
            )
            gr = jax.jit(jax.grad(lambda q, k, v: r(q, k, v).sum(), argnums=(0, 1, 2)))
            e = (
                e,
                [
                    err(a, b)
                    for a, b in zip(
                        jax.device_get(g(q[:2], k[:2], v[:2])),
                        jax.device_get(gr(q[:2], k[:2], v[:2])),
                    )
                ],
            )
        print(
            "attention",
            H,
            U,
            "fwd",
            timeit(f, q, k, v),
            "fwd+bwd",
            timeit(g, q, k, v),
            "err",
            e,
            flush=True,
        )
    except Exception as ex:
        print("attention", H, U, type(ex), str(ex)[:300])
