for line in open(0):
    print(-sum(int(c) if i % 2 else int(c) * 2 for i, c in enumerate(line[-2::-1])) % 10)
