"""Functions on whole models: conversion, joint alignment, caching and folding."""
