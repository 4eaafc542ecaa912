"""What tests name as package.module:factory."""

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 4)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


instance = Net()


def good():
    return Net(), (torch.zeros(3, 8),)


def bare():
    return Net()


def raising():
    raise RuntimeError("no such luck")


def number():
    return 3


def odd_inputs():
    return Net(), 7
