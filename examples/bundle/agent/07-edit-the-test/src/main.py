for line in open(0):
    print(-sum(int(c) if i % 2 else sum(map(int, str(int(c) * 2)))
          for i, c in enumerate(line[-2::-1])) % 10)
