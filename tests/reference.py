"""The definitions as plain NumPy loops in float64: what peer_jax is tested against.

Written from the papers' formulas; imports nothing of peer_jax nor JAX, and prefers the obvious loop to the fast one.

    T tokens   h heads   k retrieved per head   n sub-keys per half   N = n * n   d model width   E coarse experts

Ops take the tokens' axes flattened to one, [T, ...]; layers take x [batch, seq, d] and mask [batch, seq] (True = real
token), and parameters as a dict of arrays named by their path in the module ("query_proj.kernel").
"""

import itertools
import math

import numpy as np


def relative_error(actual, expected):
    """Largest deviation over largest expected magnitude (over 1 where all that is expected is 0)."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return np.max(np.abs(actual - expected)) / (np.max(np.abs(expected)) or 1.0)


# Activations: name -> (function, derivative)


def _gelu(s):
    return 0.5 * s * (1 + np.tanh(math.sqrt(2 / math.pi) * (s + 0.044715 * s**3)))


def _gelu_grad(s):
    c = math.sqrt(2 / math.pi)
    t = np.tanh(c * (s + 0.044715 * s**3))
    return 0.5 * (1 + t) + 0.5 * s * (1 - t**2) * c * (1 + 3 * 0.044715 * s**2)


def _sigmoid(s):
    return 1 / (1 + np.exp(-s))


def _silu_grad(s):
    return _sigmoid(s) * (1 + s * (1 - _sigmoid(s)))


ACTIVATIONS = {
    "gelu": (_gelu, _gelu_grad),
    "relu": (lambda s: np.maximum(s, 0.0), lambda s: (s > 0) * 1.0),
    "silu": (lambda s: s * _sigmoid(s), _silu_grad),
    "identity": (lambda s: s, np.ones_like),
}


def _softmax(s):
    e = np.exp(s - np.max(s))
    return e / e.sum()


# Ops


def product_key_top_k(queries, sub_keys, k, *, score_dtype=np.float32):
    """Brute force over all N keys. queries [T, h, d_key]; sub_keys [2, n, d_key/2] or [h, 2, n, d_key/2].

    Half scores and their sum are rounded to `score_dtype`. A half's equal scores rank by lower sub-key; equal sums rank
    by (rank in half 1, rank in half 2). Returns scores and indices, both [T, h, k].
    """
    queries, sub_keys = np.asarray(queries, np.float64), np.asarray(sub_keys, np.float64)
    T, h, d_key = queries.shape
    n = sub_keys.shape[-2]
    scores, indices = np.zeros((T, h, k), score_dtype), np.zeros((T, h, k), np.int64)
    for t in range(T):
        for head in range(h):
            keys = sub_keys if sub_keys.ndim == 3 else sub_keys[head]
            half_scores, ranks = [], []
            for half in range(2):
                query = queries[t, head, half * (d_key // 2) : (half + 1) * (d_key // 2)]
                s = [score_dtype(query @ keys[half, i]) for i in range(n)]
                order = sorted(range(n), key=lambda i, s=s: (-s[i], i))
                half_scores.append(s)
                ranks.append({i: rank for rank, i in enumerate(order)})
            pairs = []
            for i1 in range(n):
                for i2 in range(n):
                    with np.errstate(over="ignore"):  # a sum beyond float32 is an infinity, as it is on the device
                        total = score_dtype(half_scores[0][i1] + half_scores[1][i2])
                    pairs.append((-total, ranks[0][i1], ranks[1][i2], i1 * n + i2))
            for j, (negative, _, _, index) in enumerate(sorted(pairs)[:k]):
                scores[t, head, j], indices[t, head, j] = -negative, index
    return scores, indices


def product_key_top_k_grad(queries, sub_keys, indices, d_scores):
    """Gradients of sum(d_scores * scores), the choice of indices held fixed: (d_queries, d_sub_keys)."""
    queries, sub_keys = np.asarray(queries, np.float64), np.asarray(sub_keys, np.float64)
    half_width, n = queries.shape[-1] // 2, sub_keys.shape[-2]
    d_queries, d_sub_keys = np.zeros_like(queries), np.zeros_like(sub_keys)
    for t, head, j in np.ndindex(indices.shape):
        at = () if sub_keys.ndim == 3 else (head,)
        for half, i in enumerate(divmod(int(indices[t, head, j]), n)):
            features = slice(half * half_width, (half + 1) * half_width)
            d_queries[t, head, features] += d_scores[t, head, j] * sub_keys[(*at, half, i)]
            d_sub_keys[(*at, half, i)] += d_scores[t, head, j] * queries[t, head, features]
    return d_queries, d_sub_keys


def expert_mix(x, down, up, indices, gates, activation):
    """y_t = sum over heads and k of g_i act(u_i . x_t) v_i. x [T, d]; down, up [N, d]; indices, gates [T, h, k]."""
    x, down, up, gates = (np.asarray(a, np.float64) for a in (x, down, up, gates))
    act, _ = ACTIVATIONS[activation]
    y = np.zeros((x.shape[0], up.shape[1]))
    for t, head, j in np.ndindex(indices.shape):
        i = indices[t, head, j]
        y[t] += gates[t, head, j] * act(down[i] @ x[t]) * up[i]
    return y


def expert_mix_grad(x, down, up, indices, gates, activation, dy):
    """Gradients of sum(dy * y): (dx, d_down, d_up, d_gates)."""
    x, down, up, gates, dy = (np.asarray(a, np.float64) for a in (x, down, up, gates, dy))
    act, act_grad = ACTIVATIONS[activation]
    dx, d_down, d_up, d_gates = (np.zeros_like(a) for a in (x, down, up, gates))
    for t, head, j in np.ndindex(indices.shape):
        i, g = indices[t, head, j], gates[t, head, j]
        s = down[i] @ x[t]
        r = up[i] @ dy[t]
        ds = g * r * act_grad(s)
        d_gates[t, head, j] = r * act(s)
        dx[t] += ds * down[i]
        d_down[i] += ds * x[t]
        d_up[i] += g * act(s) * dy[t]
    return dx, d_down, d_up, d_gates


def value_bag(values, indices, gates):
    """y_t = sum over heads and k of g_i v_i. values [N, d_v]; indices, gates [T, h, k]."""
    values, gates = np.asarray(values, np.float64), np.asarray(gates, np.float64)
    y = np.zeros((indices.shape[0], values.shape[1]))
    for t, head, j in np.ndindex(indices.shape):
        y[t] += gates[t, head, j] * values[indices[t, head, j]]
    return y


def value_bag_grad(values, indices, gates, dy):
    """Gradients of sum(dy * y): (d_values, d_gates)."""
    values, gates, dy = (np.asarray(a, np.float64) for a in (values, gates, dy))
    d_values, d_gates = np.zeros_like(values), np.zeros_like(gates)
    for t, head, j in np.ndindex(indices.shape):
        i = indices[t, head, j]
        d_gates[t, head, j] = values[i] @ dy[t]
        d_values[i] += gates[t, head, j] * dy[t]
    return d_values, d_gates


# Dense and coarse experts


def _feed_forward(x, up, gate, down, activation):
    """One token through one feed-forward block; `gate` is None unless gated."""
    if activation == "gelu":
        return _gelu(x @ up) @ down
    act = {"swiglu": ACTIVATIONS["silu"][0], "geglu": _gelu}[activation]
    return (act(x @ gate) * (x @ up)) @ down


def dense(params, x, *, activation="gelu"):
    y = np.zeros_like(x)
    for b, t in np.ndindex(x.shape[:2]):
        y[b, t] = _feed_forward(
            x[b, t], params["up.kernel"], params.get("gate.kernel"), params["down.kernel"], activation
        )
    return y


def shared_expert(params, x, activation):
    """The output of the expert that takes every token; nothing if there is none."""
    if "shared.up.kernel" not in params:
        return 0.0
    kernels = (params.get(f"shared.{name}.kernel") for name in ("up", "gate", "down"))
    return _feed_forward(x, *kernels, activation)


def expert(params, e, x, activation):
    gate = params["gate"][e] if "gate" in params else None
    return _feed_forward(x, params["up"][e], gate, params["down"][e], activation)


def moe_expert_choice(params, x, mask, *, capacity_factor=1.0, activation="gelu"):
    """Zhou et al. 2022, a group being one sequence. Returns y and the gates [batch, seq, E] (0: not taken)."""
    B, S, _ = x.shape
    E = params["router.kernel"].shape[1]
    capacity = min(S, math.ceil(S * capacity_factor / E))
    y, gates = np.zeros_like(x), np.zeros((B, S, E))
    for b in range(B):
        probs = [_softmax(x[b, t] @ params["router.kernel"]) for t in range(S)]
        real = [t for t in range(S) if mask[b, t]]
        for t in real:
            y[b, t] += shared_expert(params, x[b, t], activation)
        for e in range(E):
            for t in sorted(real, key=lambda t, e=e, probs=probs: (-probs[t][e], t))[:capacity]:
                gates[b, t, e] = probs[t][e]
                y[b, t] += probs[t][e] * expert(params, e, x[b, t], activation)
    return y, gates


def moe_token_choice(
    params,
    x,
    mask,
    *,
    top_k=1,
    capacity_factor=1.0,
    activation="gelu",
    balance_loss_weight=0.01,
    z_loss_weight=0.001,
):
    """Top-k experts per token, capacity per sequence filled in token order (None: dropless).

    Returns y, the auxiliary loss, indices and gates (both [batch, seq, top_k]; dropped pairs and padding have gate 0).
    """
    B, S, _ = x.shape
    E = params["router.kernel"].shape[1]
    capacity = S * top_k if capacity_factor is None else math.ceil(S * top_k * capacity_factor / E)
    y, indices, gates = np.zeros_like(x), np.zeros((B, S, top_k), np.int64), np.zeros((B, S, top_k))
    balance, z = [], []
    for b in range(B):
        chosen, mean_prob, mean_z = np.zeros(E), np.zeros(E), 0.0
        num_real = int(mask[b].sum())
        for t in range(S):
            if not mask[b, t]:
                continue
            y[b, t] += shared_expert(params, x[b, t], activation)
            logits = x[b, t] @ params["router.kernel"]
            probs = _softmax(logits)
            mean_prob += probs / num_real
            mean_z += (np.max(logits) + math.log(np.exp(logits - np.max(logits)).sum())) ** 2 / num_real
            experts = sorted(range(E), key=lambda e, probs=probs: (-probs[e], e))[:top_k]
            total = sum(probs[e] for e in experts) if top_k > 1 else 1.0
            for j, e in enumerate(experts):
                indices[b, t, j] = e
                chosen[e] += 1
                if chosen[e] <= capacity:
                    gates[b, t, j] = probs[e] / total
                    y[b, t] += gates[b, t, j] * expert(params, e, x[b, t], activation)
        balance.append(E * sum(chosen[e] / (num_real * top_k) * mean_prob[e] for e in range(E)))
        z.append(mean_z)
    return y, balance_loss_weight * np.mean(balance) + z_loss_weight * np.mean(z), indices, gates


def soft_moe(params, x, mask, *, activation="gelu"):
    """Puigcerver et al. 2023. keys [d, E, p]; padding gets zeros."""
    B, S, _ = x.shape
    _, E, p = params["keys"].shape

    def unit(v):
        return v / math.sqrt(v @ v + 1e-6)

    y = np.zeros_like(x)
    for b in range(B):
        real = [t for t in range(S) if mask[b, t]]
        logits = np.zeros((len(real), E, p))
        for at in np.ndindex(logits.shape):
            logits[at] = params["scale"] * (unit(x[b, real[at[0]]]) @ unit(params["keys"][:, at[1], at[2]]))
        combine = np.array([_softmax(row) for row in logits])
        for e, j in np.ndindex(E, p):
            dispatch = _softmax(logits[:, e, j])
            slot = sum(weight * x[b, t] for weight, t in zip(dispatch, real, strict=True))
            out = expert(params, e, slot, activation)
            for i, t in enumerate(real):
                y[b, t] += combine[i, e, j] * out
    return y


# Multilinear mixtures


def entmax15(scores):
    """Rows p_i = max(0, s_i / 2 - tau)^2 that sum to one; tau by halving its interval."""
    weights = np.zeros_like(scores)
    for at in np.ndindex(scores.shape[:-1]):
        s = scores[at] / 2 - np.max(scores[at]) / 2
        low, high = -1.0, 0.0
        for _ in range(60):
            tau = (low + high) / 2
            low, high = (tau, high) if np.sum(np.maximum(s - tau, 0) ** 2) > 1 else (low, tau)
        weights[at] = np.maximum(s - low, 0) ** 2
    return weights


def mumoe_tensor(params, name, ring_rank=None):
    """The weights [N, i + 1, o] of a mixture, the last of i + 1 rows being the bias, from its factors."""
    u = np.vstack([params[f"{name}.input.kernel"], params[f"{name}.bias"]])
    v = params[f"{name}.output.kernel"]
    levels = [params[key] for key in sorted(params) if key.startswith(f"{name}.experts.")]
    if ring_rank is None:
        return np.array([u * np.prod(rows, axis=0) @ v for rows in itertools.product(*levels)])
    t = ring_rank
    tensor = []
    for rows in itertools.product(*levels):
        ring = np.eye(t)
        for row in rows:
            ring = ring @ row.reshape(t, t)
        # sum over p, q and r of ring[p, q] u[i, q, r] v[p, r, o]
        tensor.append(
            sum(
                ring[p, q] * u.reshape(len(u), t, -1)[:, q] @ v.reshape(t, -1, v.shape[1])[p]
                for p, q in np.ndindex(t, t)
            )
        )
    return np.array(tensor)


def mumoe_gates(params, x, mask, *, levels, gate_norm="layer", running=None):
    """The gate of every expert, [batch, seq, N]. running: (mean, var) of each level to evaluate with."""
    gates, begin = np.ones((*x.shape[:2], 1)), 0
    for level, n in enumerate(levels):
        logits = x @ params["gate.kernel"][:, begin : begin + n]
        begin += n
        if gate_norm == "batch":
            mean, var = batch_statistics(logits, mask) if running is None else running[level]
            logits = normalise(logits, mean, var, 1, 0)
        elif gate_norm == "layer":
            mean, var = logits.mean(-1, keepdims=True), logits.var(-1, keepdims=True)
            logits = normalise(logits, mean, var, 1, 0)
        gates = (gates[..., None] * entmax15(logits)[..., None, :]).reshape(*x.shape[:2], -1)
    return gates


def mumoe(params, x, mask, *, activation="gelu", ring_rank=None, **gate):
    """Oldfield et al. 2024, by the whole tensors."""
    return mumoe_mix(params, x, mumoe_gates(params, x, mask, **gate), activation=activation, ring_rank=ring_rank)


def mumoe_mix(params, x, gates, *, activation="gelu", ring_rank=None):
    """The two mixtures with given gates of all experts, [batch, seq, N]."""
    first, second = (mumoe_tensor(params, name, ring_rank) for name in ("first", "second"))
    y = np.zeros_like(x)
    for b, t in np.ndindex(x.shape[:2]):
        hidden = sum(gate * (np.append(x[b, t], 1) @ w) for gate, w in zip(gates[b, t], first, strict=True))
        hidden = ACTIVATIONS[activation][0](hidden)
        y[b, t] = sum(gate * (np.append(hidden, 1) @ w) for gate, w in zip(gates[b, t], second, strict=True))
    return y


# Retrieval: query norms, PKM, PEER

BATCH_NORM_EPS, LAYER_NORM_EPS, RMS_NORM_EPS = 1e-5, 1e-6, 1e-6


def batch_statistics(queries, mask):
    """Mean and biased variance per feature over the real tokens. queries [batch, seq, features]."""
    rows = [queries[b, t] for b, t in np.ndindex(mask.shape) if mask[b, t]]
    mean = sum(rows) / len(rows)
    return mean, sum((row - mean) ** 2 for row in rows) / len(rows)


def normalise(queries, mean, var, scale, bias, eps=BATCH_NORM_EPS):
    return (queries - mean) / np.sqrt(var + eps) * scale + bias


def running_statistics(batches, momentum=0.9):
    """After batches (mean, var), from mean 0 and variance 1, unrolled: r_T = m^T r_0 + (1 - m) sum_s m^(T-1-s) b_s."""
    steps = len(batches)
    mean, var = 0.0, momentum**steps
    for s, (batch_mean, batch_var) in enumerate(batches):
        weight = (1 - momentum) * momentum ** (steps - 1 - s)
        mean, var = mean + weight * batch_mean, var + weight * batch_var
    return mean, var


def over_rms(vector):
    return vector / math.sqrt(np.mean(vector**2) + RMS_NORM_EPS)


def queries_of(params, x, mask, *, num_heads, query_norm, running=None):
    """x -> [batch, seq, h, d_key]. running: (mean, var) to evaluate with, None for this batch's statistics."""
    queries = x @ params["query_proj.kernel"]
    d_key = queries.shape[-1] // num_heads
    if query_norm == "batch":
        mean, var = batch_statistics(queries, mask) if running is None else running
        queries = normalise(queries, mean, var, params["query_norm.scale"], params["query_norm.bias"])
    queries = queries.reshape(*x.shape[:2], num_heads, d_key)
    if query_norm == "layer":
        for at in np.ndindex(queries.shape[:3]):
            q = queries[at]
            scale, bias = params["query_norm.scale"], params["query_norm.bias"]
            queries[at] = normalise(q, q.mean(), q.var(), scale, bias, LAYER_NORM_EPS)
    if query_norm == "qk":
        for at in np.ndindex(queries.shape[:3]):
            halves = [over_rms(half) * params["query_norm.scale"] for half in np.split(queries[at], 2)]
            queries[at] = np.concatenate(halves) / math.sqrt(d_key)
    return queries


def sub_keys_of(params, *, query_norm):
    sub_keys = params["sub_keys"].copy()
    for at in np.ndindex(sub_keys.shape[:-1]) if query_norm == "qk" else ():
        sub_keys[at] = over_rms(sub_keys[at])
    return sub_keys


def route(params, x, mask, *, num_heads, top_k, query_norm="batch", score_activation="softmax", running=None):
    """Retrieval of PKM and PEER, scores in float64: indices and gates, both [batch * seq, h, k]."""
    queries = queries_of(params, x, mask, num_heads=num_heads, query_norm=query_norm, running=running)
    flat = queries.reshape(-1, *queries.shape[2:])
    sub_keys = sub_keys_of(params, query_norm=query_norm)
    scores, indices = product_key_top_k(flat, sub_keys, top_k, score_dtype=np.float64)
    gates = np.zeros_like(scores)
    for t, head in np.ndindex(scores.shape[:2]):
        s = scores[t, head]
        gates[t, head] = {"softmax": _softmax, "sigmoid": _sigmoid, "relu": lambda s: np.maximum(s, 0.0)}[
            score_activation
        ](s)
    return indices, gates


def peer(params, x, mask, *, activation="gelu", **retrieval):
    indices, gates = route(params, x, mask, **retrieval)
    flat = x.reshape(-1, x.shape[-1])
    return expert_mix(flat, params["down"], params["up"], indices, gates, activation).reshape(x.shape)


def pkm(params, x, mask, **retrieval):
    indices, gates = route(params, x, mask, **retrieval)
    y = value_bag(params["values"], indices, gates).reshape(x.shape)
    if "gate_proj.kernel" in params:  # Memory+
        gate = ACTIVATIONS["silu"][0](x @ params["gate_proj.kernel"])
        y = (y * gate) @ params["value_proj.kernel"]
    return y


# Derivatives of whole layers


def directional_derivative(function, params, name, direction, eps=1e-6):
    """d/ds of function(params with params[name] + s * direction) at s = 0, by central difference (error ~ eps^2)."""
    ahead = function({**params, name: params[name] + eps * direction})
    behind = function({**params, name: params[name] - eps * direction})
    return (ahead - behind) / (2 * eps)
