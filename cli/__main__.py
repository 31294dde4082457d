from pertstate.cli import main


raise SystemExit(main())
