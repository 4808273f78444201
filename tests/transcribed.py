"""What other projects' trainers compute, line by line: dense matrices, loops over images, `.backward` that
writes. Written from what they do; the tests of pyreid.compat hold ours against it."""

import collections

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

# --- distances ------------------------------------------------------------------------------------


def neighbours(lists, i, columns):
    """Those among the first neighbours of i that have i among theirs, as a list."""
    return [j for j in lists[i, :columns] if i in lists[j, :columns]]


def encoded(near, lists, columns, k1, k2):
    """(N, N) rows of weights: reciprocal neighbours, those of near neighbours, mean over k2 neighbours."""
    count = len(near)
    weights = np.zeros((count, count), np.float32)
    half = int(np.around(k1 / 2)) + 1
    for i in range(count):
        core = neighbours(lists, i, columns)
        members = set(core)
        for j in core:
            others = neighbours(lists, j, half)
            if len(set(others) & set(core)) > 2 / 3 * len(others):
                members |= set(others)
        ids = sorted(members)
        raw = np.exp(-near[i, ids])
        weights[i, ids] = raw / raw.sum()
    if k2 != 1:
        weights = np.stack([weights[lists[i, :k2]].mean(axis=0) for i in range(count)])
    return weights


def jaccard_of(weights, rows):
    shared = [np.minimum(weights[i], weights).sum(axis=1) for i in range(rows)]
    return np.stack([1 - row / (2 - row) for row in shared])


def spcl_jaccard(features, k1, k2):
    """SpCL, Cluster Contrast, ICE, GCL: k1 neighbours by faiss, unit features."""
    features = features.cpu().numpy().astype(np.float64)
    near = 2 - 2 * features @ features.T
    lists = np.argsort(near, axis=1, kind="stable")[:, :k1]
    distance = jaccard_of(encoded(near, lists, k1, k1, k2), len(features))
    return np.maximum(distance, 0).astype(np.float32)


def openunreid_jaccard(features, k1, k2):
    """The same of squared distances of features as they are."""
    features = features.cpu().numpy().astype(np.float64)
    near = ((features[:, None] - features) ** 2).sum(axis=2)
    lists = np.argsort(near, axis=1, kind="stable")[:, :k1]
    distance = jaccard_of(encoded(near, lists, k1, k1, k2), len(features))
    return np.maximum(distance, 0).astype(np.float32)


def mmt_jaccard(features, k1, k2, lambda_value=0, source=None):
    """MMT: all neighbours sorted, k1 + 1 of them asked, distances by the maximum of their column."""
    features = features.cpu().double()
    near = (features[:, None] - features).square().sum(dim=2)
    near = (near / near.max(dim=0)[0]).T.numpy()
    lists = np.argsort(near, axis=1, kind="stable")
    distance = torch.from_numpy(
        np.maximum(jaccard_of(encoded(near, lists, k1 + 1, k1, k2), len(features)), 0)
    ).float()
    if lambda_value > 0:
        apart = (features[:, None] - source.cpu().double()).square().sum(dim=2)
        nearest = (1 - torch.exp(-apart)).min(dim=1)[0]
        nearest = (nearest / nearest.max()).float()
        prior = nearest[:, None] + nearest
        distance = distance * (1 - lambda_value) + prior * lambda_value
    return distance


def re_ranking(q_g, q_q, g_g, k1, k2, lambda_value):
    """Zhong et al.: of given distances, squared, by the maximum of their column."""
    whole = np.block([[q_q, q_g], [q_g.T, g_g]]).astype(np.float64) ** 2
    near = (whole / whole.max(axis=0)).T
    lists = np.argsort(near, axis=1, kind="stable")
    queries = len(q_g)
    jaccard = jaccard_of(encoded(near, lists, k1 + 1, k1, k2), queries)
    mixed = jaccard * (1 - lambda_value) + near[:queries] * lambda_value
    return mixed[:, queries:].astype(np.float32)


# --- memories -------------------------------------------------------------------------------------


class Sequential(torch.autograd.Function):
    """features @ bank.T; backward moves the bank, sample by sample."""

    @staticmethod
    def forward(ctx, inputs, rows, bank, momentum):
        ctx.bank, ctx.momentum = bank, momentum
        ctx.save_for_backward(inputs, rows)
        return inputs @ bank.T

    @staticmethod
    def backward(ctx, gradient):
        inputs, rows = ctx.saved_tensors
        of_inputs = gradient @ ctx.bank
        for x, row in zip(inputs, rows.tolist(), strict=True):
            ctx.bank[row] = ctx.momentum * ctx.bank[row] + (1 - ctx.momentum) * x
            ctx.bank[row] /= ctx.bank[row].norm()
        return of_inputs, None, None, None


class Hardest(torch.autograd.Function):
    """The same, but each row is moved once, by the input with the smallest product."""

    @staticmethod
    def forward(ctx, inputs, rows, bank, momentum):
        ctx.bank, ctx.momentum = bank, momentum
        ctx.save_for_backward(inputs, rows)
        return inputs @ bank.T

    @staticmethod
    def backward(ctx, gradient):
        inputs, rows = ctx.saved_tensors
        of_inputs = gradient @ ctx.bank
        members = collections.defaultdict(list)
        for x, row in zip(inputs, rows.tolist(), strict=True):
            members[row].append(x)
        for row, xs in members.items():
            hardest = np.argmin([float(x @ ctx.bank[row]) for x in xs])
            ctx.bank[row] = ctx.momentum * ctx.bank[row] + (1 - ctx.momentum) * xs[hardest]
            ctx.bank[row] /= ctx.bank[row].norm()
        return of_inputs, None, None, None


def masked_softmax_loss(products, labels, targets, temperature):
    """SpCL: mean product of each label, softmax over the labels present, with 1e-6 twice."""
    products = products / temperature
    count = int(labels.max()) + 1
    sums = torch.zeros(count, len(products)).index_add(0, labels, products.T)
    sizes = torch.bincount(labels, minlength=count)[:, None]
    present = (sizes > 0).float()
    means = (sums / sizes.clamp(min=1)).T
    exps = means.exp() * present.T
    probabilities = exps / (exps.sum(dim=1, keepdim=True) + 1e-6)
    return F.nll_loss(torch.log(probabilities + 1e-6), targets)


class HybridMemory(nn.Module):
    """SpCL's."""

    def __init__(self, num_features, num_samples, temp=0.05, momentum=0.2):
        super().__init__()
        self.temp, self.momentum = temp, momentum
        self.register_buffer("features", torch.zeros(num_samples, num_features))
        self.register_buffer("labels", torch.zeros(num_samples).long())

    def forward(self, inputs, indexes):
        products = Sequential.apply(inputs, indexes, self.features, self.momentum)
        return masked_softmax_loss(products, self.labels, self.labels[indexes], self.temp)


class ClusterMemory(nn.Module):
    """Cluster Contrast's."""

    def __init__(self, num_features, num_samples, temp=0.05, momentum=0.2, use_hard=False):
        super().__init__()
        self.temp, self.momentum = temp, momentum
        self.products = Hardest if use_hard else Sequential
        self.register_buffer("features", torch.zeros(num_samples, num_features))

    def forward(self, inputs, targets):
        inputs = F.normalize(inputs, dim=1)
        products = self.products.apply(inputs, targets, self.features, self.momentum)
        return F.cross_entropy(products / self.temp, targets)


class Memory(nn.Module):
    """GCL's."""

    def __init__(self, num_features, num_samples, temp=0.07, momentum=0.2, K=8192):
        super().__init__()
        self.temp, self.momentum, self.K = temp, momentum, K
        self.register_buffer("features", torch.zeros(num_samples, num_features))
        self.register_buffer("labels", torch.zeros(num_samples).long())

    def forward(self, f, f_nv, indexes):
        bank = self.features.clone()
        terms = []
        real, generated = f @ bank.T, f_nv @ bank.T
        for i, row in enumerate(indexes.tolist()):
            same = self.labels == self.labels[row]
            of_real = real[i, same]
            of_real = of_real[torch.randperm(len(of_real))[:1]]
            of_generated = generated[i, same]
            of_generated = of_generated[torch.randperm(len(of_generated))[:1]]
            others = generated[i, ~same]
            others = others[torch.randperm(len(others))[: self.K]]
            itself = generated[i, row : row + 1]
            for positive in (itself, of_generated, of_real):
                logits = torch.cat([positive, others]) / self.temp
                terms.append(-F.log_softmax(logits, dim=0)[0])
        with torch.no_grad():
            old = self.features.index_select(0, indexes)
            moved = F.normalize(self.momentum * old + (1 - self.momentum) * f)
            for row, value in zip(indexes.tolist(), moved, strict=True):
                self.features[row] = value
        return torch.stack(terms).sum() / len(f)


# --- clusters -------------------------------------------------------------------------------------


def cluster_centres(labels, features):
    """Cluster Contrast: the mean feature of each cluster."""
    members = collections.defaultdict(list)
    for label, feature in zip(labels, features, strict=True):
        if label != -1:
            members[int(label)].append(feature)
    return torch.stack([torch.stack(members[label]).mean(0) for label in sorted(members)])


def unequal(labels, others):
    """(N,) SpCL: 1 - overlap of each image's clusters, by two N x N matrices."""
    a = (labels[:, None] == labels).float()
    b = (others[:, None] == others).float()
    return 1 - torch.min(a, b).sum(-1) / torch.max(a, b).sum(-1)


def rho_eps(distance, rho):
    """GCL, MMT: as their scripts have it, whatever `distance` is."""
    above = np.triu(distance, 1)
    above = above[np.nonzero(above)]
    above = np.sort(above, axis=None)
    return above[: np.round(rho * above.size).astype(int)].mean()
