from uptrain.cli import main

main()
