DOUBLED = "0516273849"
for line in open(0):
    total = sum(map(int, line[-3::-2])) + sum(map(DOUBLED.find, line[-2::-2]))
    print(-total % 10)
