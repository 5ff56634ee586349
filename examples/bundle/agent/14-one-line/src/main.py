for s in open(0):print((-sum(map(int,s[-3::-2]))-sum(map("0516273849".find,s[-2::-2])))%10)
